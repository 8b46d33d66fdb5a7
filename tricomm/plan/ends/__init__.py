"""What callers name at both ends of a plan, and the items between them."""

"""What planning costs, by layout and number of ranks."""

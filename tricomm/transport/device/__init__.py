"""What is queued on a device: a run that goes on when its call has returned, and communicators of some ranks."""

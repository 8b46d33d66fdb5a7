"""One tensor between layouts on emulated hosts, against the NIC bound and against peers."""

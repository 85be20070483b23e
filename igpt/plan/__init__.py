"""Plans the memory, time and communication of training runs on machines that are not attached."""

"""What kvplug tells of itself while it serves."""

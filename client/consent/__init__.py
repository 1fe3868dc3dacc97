"""The consent of a device's owner: their policy, the runs offered, and their recorded yes."""

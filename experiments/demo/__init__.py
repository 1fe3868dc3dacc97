"""`make demo-devices`: a server and devices as processes of this machine."""

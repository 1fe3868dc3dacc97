"""What people got: base, shared and personal models on held-out records."""

"""What both sides must agree on: no flwr, no opacus."""

"""What the owner types: `privet client`, and what it prints."""

"""What leaves, and what it cost: the gate, the ledger, the masked upload."""

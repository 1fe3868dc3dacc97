"""The privacy core of a device: the gate, the ledger of what was spent, the masked upload."""

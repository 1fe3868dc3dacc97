"""The personal part of the model: heads that are fitted on own records and never leave."""

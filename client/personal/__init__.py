"""The personal part: heads that are fitted on own records and never leave."""

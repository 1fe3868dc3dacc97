"""The server, which sees sums of contributions only."""

"""privet: federated, differentially private personalisation of language models."""

"""Model families this project ships itself because transformers does not."""

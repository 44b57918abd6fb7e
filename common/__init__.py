"""The verbs the recipes share: one noun per file, plain functions, nothing that knows a model family."""

"""Fine-tuning ChatGLM-6B on Chinese instructions."""

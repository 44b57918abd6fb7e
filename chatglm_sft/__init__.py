"""Fine-tuning ChatGLM-6B, ChatGLM2, ChatGLM3 and GLM-4 on Chinese instructions."""

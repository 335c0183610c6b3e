"""Methods that combine several fine-tuned models into one."""

"""What the student kept of its teacher, on prompts it never trained on, with intervals."""

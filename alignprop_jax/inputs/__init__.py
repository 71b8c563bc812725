"""What users and others give: JSON, Python files, flags."""

"""What a program does about signals, children, and a full disk or memory."""

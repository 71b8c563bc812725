"""What samples are worth: rewards on fixed noise, independent judges, intervals."""

"""Memory: who owns it, who reads it and until when, who shares it with whom."""

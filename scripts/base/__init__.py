"""What all measurement scripts share."""

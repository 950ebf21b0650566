"""What a run trains: one file per objective."""

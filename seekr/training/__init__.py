"""Training of one task by one or many workers, without Ray and without storage."""

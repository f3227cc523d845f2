"""What made the embedded images, the embedded model and its task vectors."""

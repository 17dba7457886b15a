"""What several tests share: a small real model and pictures that it understands."""

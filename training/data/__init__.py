"""COCO-format data: reading, augmentation and batches with their targets."""

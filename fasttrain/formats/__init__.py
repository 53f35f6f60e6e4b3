"""What a data set on disk is: JPEG, image, listing and folder, .beton, .tar, manifest, writers."""

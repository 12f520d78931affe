"""All that runs inside the image, behind the door."""

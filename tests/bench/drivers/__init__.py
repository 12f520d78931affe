"""One file per engine: how it is set up, loaded and driven. The file's name is the driver's module."""

"""Examples for application and platform developers, each run as it stands by a script."""

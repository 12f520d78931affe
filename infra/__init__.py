"""Everything around the image: templates, deploy verbs, runtime emulator, Marketplace."""

"""The sealed package: format, builder, opener, keys, licences."""

"""The C++ extension: found, or built."""

"""Reads and writes scans (NIfTI, DICOM, pictures, archives); finds the lungs. formats.py explains a new format."""

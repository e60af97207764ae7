"""A file <-> a scan: NIfTI, DICOM, pictures, archives, and the lungs in a scan. formats.py says how to add one."""

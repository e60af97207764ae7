"""A file <-> a scan: NIfTI, DICOM, pictures, archives, and the lungs in a scan. Open it to add a file format."""

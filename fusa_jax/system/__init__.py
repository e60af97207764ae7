"""What every room stands on: errors and exits, files, processes and devices, memory, pages."""

"""Services that all other packages use: errors, exit codes, files, processes, devices, memory and pages."""

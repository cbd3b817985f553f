"""The commands of swiprctl that take more than a line. Each is imported when it is asked for."""

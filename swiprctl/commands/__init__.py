"""The commands of swiprctl, by the whole client. Each is imported when it is asked for."""

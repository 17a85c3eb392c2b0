"""What each command does, behind the command line: functions that return data, and the text that shows it."""

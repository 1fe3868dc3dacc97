"""LaMP: tasks of personalised answers, from their published files."""

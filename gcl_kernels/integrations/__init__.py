"""The losses of this package inside other libraries' trainers. Each module imports its library when it is used, not before."""

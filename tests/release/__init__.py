"""Whether what is released is whole: distributions, versions, locked packages, and the files of .github."""

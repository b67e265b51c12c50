# Prints what the file of one write holds, exactly as content.py says. Variables: writer, serial, lines.
BEGIN {
    start = sprintf("cowfence writer %02d serial %08d line ", writer, serial)
    rest = sprintf("%465s", "")
    gsub(/ /, ".", rest)
    for (line = 0; line < lines; line++) printf "%s%06d%s\n", start, line, rest
}

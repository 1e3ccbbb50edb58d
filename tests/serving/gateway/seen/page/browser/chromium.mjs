// Prints where Chromium is; the first time it unpacks it into TMPDIR.
import chromium from "@sparticuz/chromium";

console.log(await chromium.executablePath());

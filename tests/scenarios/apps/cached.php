<?php
// A page with a cached value: each request holds the lock on the file in the variable CACHE for 2 ms, as those that use PHP's
// sessions do. On the command line: the job that rebuilds the file, with the lock held.
$cache = fopen(getenv('CACHE'), 'c+');
flock($cache, LOCK_EX);
if (PHP_SAPI === 'cli') {
    sleep(60);
}
$views = (int) stream_get_contents($cache) + 1;
usleep(2000);
rewind($cache);
fwrite($cache, (string) $views);
fclose($cache);
echo "$views\n";

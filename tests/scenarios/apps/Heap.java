import com.sun.net.httpserver.HttpServer;
import java.net.InetAddress;
import java.net.InetSocketAddress;
import java.util.ArrayList;
import java.util.List;
import java.util.concurrent.Executors;

/**
 * The JDK's own HTTP server: Heap.java PORT. Each request allocates 3 MB that it drops at once. `/keep/N` keeps N MB in small
 * objects from then on, `/drop` drops them.
 */
public class Heap {
    private static volatile List<byte[]> kept = List.of();

    // Visible to other threads, so that the compiler cannot remove the allocation.
    private static volatile byte[] last;

    public static void main(String[] args) throws Exception {
        int port = Integer.parseInt(args[0]);
        HttpServer server = HttpServer.create(new InetSocketAddress(InetAddress.getLoopbackAddress(), port), 400);
        server.createContext("/", exchange -> {
            String path = exchange.getRequestURI().getPath();
            if (path.startsWith("/keep/")) {
                // An array of 32 bytes takes 48 with its header, and 4 in the list.
                int count = Integer.parseInt(path.substring("/keep/".length())) * 1024 * 1024 / 52;
                List<byte[]> list = new ArrayList<>(count);
                for (int i = 0; i < count; i++) {
                    list.add(new byte[32]);
                }
                kept = list;
            } else if (path.equals("/drop")) {
                kept = List.of();
            }
            for (int i = 0; i < 3000; i++) {
                last = new byte[1024];
            }
            byte[] answer = "done\n".getBytes();
            exchange.sendResponseHeaders(200, answer.length);
            exchange.getResponseBody().write(answer);
            exchange.close();
        });
        server.setExecutor(Executors.newFixedThreadPool(4));
        server.start();
        System.out.println("listening");
    }
}

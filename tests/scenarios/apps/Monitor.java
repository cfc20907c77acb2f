import com.sun.net.httpserver.HttpServer;
import java.io.IOException;
import java.io.InputStream;
import java.net.InetAddress;
import java.net.InetSocketAddress;
import java.net.Socket;
import java.util.concurrent.Executors;

/** The JDK's own HTTP server: Monitor.java PORT CALLED. Each request makes a call inside a synchronized method. */
public class Monitor {
    private final Socket called;

    Monitor(int port) throws IOException {
        called = new Socket(InetAddress.getLoopbackAddress(), port);
        called.setTcpNoDelay(true);
    }

    synchronized int ask() throws IOException {
        called.getOutputStream().write('?');
        InputStream answers = called.getInputStream();
        return answers.read();
    }

    public static void main(String[] args) throws Exception {
        Monitor monitor = new Monitor(Integer.parseInt(args[1]));
        InetAddress here = InetAddress.getLoopbackAddress();
        HttpServer server = HttpServer.create(new InetSocketAddress(here, Integer.parseInt(args[0])), 400);
        server.createContext("/", exchange -> {
            byte[] answer = (monitor.ask() + "\n").getBytes();
            exchange.sendResponseHeaders(200, answer.length);
            exchange.getResponseBody().write(answer);
            exchange.close();
        });
        server.setExecutor(Executors.newFixedThreadPool(8));
        server.start();
        System.out.println("listening");
    }
}
